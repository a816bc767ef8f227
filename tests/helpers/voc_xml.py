"""Content of the XML files and lists of a folder in Pascal VOC's layout, read without hemoco."""

from collections import Counter
from pathlib import Path
from xml.dom import minidom

Corners = tuple[int, int, int, int]


def listed_splits(folder: Path) -> dict[str, int]:
    """Returns the number of images in each list that is a split."""
    lists = {
        name: (folder / "ImageSets" / "Main" / f"{name}.txt") for name in ("train", "val", "test")
    }
    return {name: len(path.read_text().split()) for name, path in lists.items()}


def count_objects(folder: Path) -> "Counter[tuple[str, str, Corners]]":
    """Counts the objects in all XML files, by (image name, class, corners as written)."""
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
