"""Images and annotations in the forms that people bring to `pack`."""
