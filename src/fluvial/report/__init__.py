"""Tables, lines and pages for people."""
