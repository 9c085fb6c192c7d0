"""Sites, fleets, failures, bytes and bounds."""
