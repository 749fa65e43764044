.PHONY: setup demo demo-lm demo-federation test check slow bench

setup:            ## build .venv, with the demo's model and data, when it is missing or out of date
	@scripts/setup

demo: setup       ## fine-tune a real model over ten clients, in a few minutes
	@.venv/bin/fedlora run demo

demo-lm: setup    ## fine-tune a small language model over four owners, in some minutes
	@scripts/demo-lm

demo-federation: setup ## a server and three clients on this machine, as they would be on four
	@scripts/demo-federation

test: setup       ## the fast suite
	@scripts/test

check: setup      ## lint, types, import directions, documentation
	@scripts/check

slow: setup       ## the tests that take minutes
	@scripts/smollm2
	@scripts/test -m slow

bench: setup      ## how fast it is, against its peers; --quick and names with scripts/bench
	@scripts/bench
