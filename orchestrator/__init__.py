"""What runs in the driver: plan, place, watch, judge. Loads no torch."""
