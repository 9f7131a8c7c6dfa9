"""A double of pylibraft's arrays, over the double of the driver."""
