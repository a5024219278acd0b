//! Who is there and what each runs.
