"""Proposal of a configuration: what data and model say, the settings that follow, and their why."""
