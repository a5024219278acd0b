.DEFAULT_GOAL := help
.PHONY: help demo generate test architecture sim chaos check check-long bench format lint servers matrix licences

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: servers ## two throw-away servers, a replication, a crash in the middle, a comparison (20 s)
	@echo "compiling the service and the demo; the first time this takes some minutes"
	cargo build --locked --bin stream-replicator --example demo
	@cargo run --locked --quiet --example demo

test: servers ## all tests, on real nats-servers
	contrib/run-tests --workspace -- --test-threads 4

architecture: ## the rules of ARCHITECTURE.md, read from the sources: imports, purity, sockets, lengths, names
	cargo test --locked --test architecture

sim: ## the copy core in simulation: 10,000 seeds, SEEDS=n of them, or SEED=n alone
	SEEDS=$(or $(SEEDS),10000) cargo test --locked --test sim -- --nocapture

chaos: servers ## three instances between two clusters while everything fails: SECONDS=n of it (120), a SEED=n again
	CHAOS_SECONDS=$(or $(SECONDS),120) SEED=$(SEED) cargo test --locked --test it -- --ignored --nocapture long_storm

check: format lint licences test matrix ## what has to pass before a merge: format, clippy, tests, server versions, licences

check-long: check ## check, the long tests and a short bench
	contrib/run-tests --workspace -- --ignored
	MATRIX=all contrib/version-matrix
	$(MAKE) --no-print-directory sim
	contrib/break-on-purpose
	cargo bench --locked --bench copy -- --quick

bench: servers ## speed, CPU and memory beside a native source and a stop-and-wait copier
	cargo bench --locked --bench copy -- $(ARGS)

generate: ## what is made from the code: schemas/ and docs/configuration.md
	GENERATE=1 cargo test --locked --quiet --test it ::current_

format:
	cargo fmt --all --check

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings
	contrib/break-on-purpose --check
	contrib/check-words

# Where nothing can be downloaded, a server of your own will do for most tests.
servers:
	@contrib/fetch-nats-server --all >/dev/null || test -n "$$NATS_SERVER"

matrix: servers ## the tests that speak to both servers, on other server versions
	contrib/version-matrix

licences:
	contrib/check-licences
	contrib/check-advisories
