"""The planner of FedPipe: pure functions from what sites measured to what each of them trains.

Figures that decide are integers, or floats from single operations in a fixed order, so equal inputs
give equal plans on every machine. The paper gives no equations; all of this is our concretisation.
"""
