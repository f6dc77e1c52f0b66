"""One static site of a set of records: `write.write_site`."""
