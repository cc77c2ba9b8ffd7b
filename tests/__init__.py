"""The tests: packages, so that two files may have one name and a spawned child finds its module again."""
