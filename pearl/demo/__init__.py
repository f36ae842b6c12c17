"""``pearl demo``: a chat model that a package on the Python index ships, and where its files are kept."""
