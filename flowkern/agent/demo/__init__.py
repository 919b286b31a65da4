"""The agent run that comes with the package: questions about a catalogue of things, which a planner
of 0.2 M parameters answers with a search tool and a calculator.
"""
