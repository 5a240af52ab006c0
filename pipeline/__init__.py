"""Train a text-embedding model of your own domain on Ray, embed every document, and search them."""
