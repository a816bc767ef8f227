"""What the XML and lists of a folder in Pascal VOC's layout hold, read without hemoco."""

from collections import Counter
from pathlib import Path
from xml.dom import minidom

Corners = tuple[int, int, int, int]


def listed_splits(folder: Path) -> dict[str, int]:
    """Images in each of the lists that are splits of their own."""
    lists = {
        name: (folder / "ImageSets" / "Main" / f"{name}.txt") for name in ("train", "val", "test")
    }
    return {name: len(path.read_text().split()) for name, path in lists.items()}


def count_objects(folder: Path) -> "Counter[tuple[str, str, Corners]]":
    """Every object of every XML file, by the image's name, the class and the corners as they stand there."""
    found: Counter[tuple[str, str, Corners]] = Counter()
    for path in (folder / "Annotations").iterdir():
        for node in minidom.parse(str(path)).getElementsByTagName("object"):
            name, *corners = (
                node.getElementsByTagName(tag)[0].firstChild.data
                for tag in ("name", "xmin", "ymin", "xmax", "ymax")
            )
            left, top, right, bottom = map(int, corners)
            found[path.stem, name, (left, top, right, bottom)] += 1
    return found
