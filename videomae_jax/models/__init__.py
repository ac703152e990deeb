"""Pure maths on arrays: no files, no config objects, no clocks."""
