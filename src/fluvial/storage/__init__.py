"""Files that are replaced whole, paths and TOML: what lies on a disk."""
