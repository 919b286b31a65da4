"""Drop-ins: other projects' names and signatures over flowkern's kernels, so that one import line changes."""
