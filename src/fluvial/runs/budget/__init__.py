"""Choice of adapter, local steps and codec for a budget of bytes or time, by trials on public
text."""
