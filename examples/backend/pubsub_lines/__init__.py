"""A backend as small as one can be: a broker that speaks lines of JSON over TCP."""
