"""What is kept of answers: predictions, feedback on them, pictures, and search over them. Its parts:

``settings`` what is kept where, ``models`` and ``migrations`` the tables, ``database`` SQLite and PostgreSQL alike,
``events`` what one transaction does, ``writer`` the thread that does it, ``search`` what is found, ``pictures`` the
files, and ``store`` all of it as the ingress uses it. ``deferred``, ``callbacks``, ``trials``, ``reviews``, ``drift``,
``key_uses`` and ``deletions`` are functions on a connection for whoever else has something to keep.
"""
