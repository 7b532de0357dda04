"""Round a weight to INT4: the nearest grid point, with the range taken from the group or searched for least error."""
