"""MCP: tools for the clients of language models, over HTTP at /mcp; they read, and plan changes.

Only `worker.features.console.mcp.server` imports the SDK, which is an extra.
"""

PATH = "/mcp"
