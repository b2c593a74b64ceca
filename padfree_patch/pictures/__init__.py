"""Pictures of packed rows: which token sees which, and what a real batch holds. They need matplotlib."""
