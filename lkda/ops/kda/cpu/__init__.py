"""KDA on a CPU: its recurrence in C++, which the machine's own compiler compiles at first use."""
