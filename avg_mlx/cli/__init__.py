"""The command line: a file for each verb, which parses, calls the library and prints. Nothing else prints."""
