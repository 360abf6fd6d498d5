"""How results and progress are shown, in a terminal, in a notebook and on a page."""
