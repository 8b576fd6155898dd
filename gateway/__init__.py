"""The realtime gateway: wire, sockets, broker, presence, HTTP and the command line."""
