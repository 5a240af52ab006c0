"""The commands of `tep`, a module each: its docstring is the help, `arguments` parses, `main` does the work."""
