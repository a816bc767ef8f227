"""Complete configs as Python values, one file each."""
