"""What happened: facts of a compiled step and of a run, as plain numbers and text."""
