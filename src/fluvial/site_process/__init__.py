"""Sites that run as a process of their own, on their own machine."""
