"""Choice of adapter, local steps and codecs for a budget of bytes or time, by trials on public
text."""
