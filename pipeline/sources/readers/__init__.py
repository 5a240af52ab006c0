"""Readers, a module a kind of file: from an open file to rows, or a row with the reason why it is none."""
