"""A double of rmm's choice of a memory resource."""
