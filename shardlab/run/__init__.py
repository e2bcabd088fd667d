"""A step over data, many times: the data, the loop, the record of what happened."""
