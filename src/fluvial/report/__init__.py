"""Tables, lines and pages about runs, for people."""
