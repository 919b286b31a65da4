"""Drop-ins: other projects' names and signatures, so that one import line changes."""
