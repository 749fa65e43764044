"""The pictures of the report, a module a family: each makes `Picture`s of the contenders that have something to show."""
