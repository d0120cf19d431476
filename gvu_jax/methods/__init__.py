"""One paper per file, each written over the interface of `umm.py` alone."""
