"""The cases, one file each. Importing this package imports none of them: a case lives in its own process."""
