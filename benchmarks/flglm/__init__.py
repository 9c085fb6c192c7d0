"""The benchmark of split learning: time by mode and number of sites, bytes and loss by codec."""
