"""The urge to see what is new: ``curious`` joins it to any algorithm, the other files are kinds of it."""
