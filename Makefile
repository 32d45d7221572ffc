# Redoubt. `make demo` runs the main job, `make test` passes the tests; both fetch what they
# need into a cache directory ($REDOUBT_CACHE, else ~/.cache/redoubt) and install nothing.

GO        ?= go
BIN       := $(CURDIR)/bin
BENCH     ?= .
FUZZTIME  ?= 30s
SOAK      ?= .
export CGO_ENABLED = 0
TOOL      := $(GO) tool -modfile=$(CURDIR)/tools/go.mod
LAB       := $(GO) run ./lab/cmd/lab
# Packages with tests that need KVM, or what only such a host has (vhost-net, VLAN filtering): run
# natively where KVM can run guests, else in the lab.
KVM       := ./kvm ./monitor ./network ./vhostuser ./e2e

.PHONY: all build guest fetch lint unit lab-tests test demo bench soak fuzz lab tcb proto clean

all: build

build:
	$(GO) build -o $(BIN)/ ./cmd/...

# The program that end-to-end tests and the demo run inside their guests.
guest:
	$(GO) build -ldflags '-s -w' -o $(BIN)/e2e-guest ./e2e/guest

fetch:
	@$(LAB) fetch

# golangci-lint runs go vet's analyzers too (govet).
lint:
	@unformatted=$$($(TOOL) gofumpt -l $$(git ls-files --cached --others --exclude-standard '*.go' | grep -v '\.pb\.go$$\|\.connect\.go$$')); \
	if [ -n "$$unformatted" ]; then echo "gofumpt: not formatted:"; echo "$$unformatted"; exit 1; fi
	$(TOOL) golangci-lint run --allow-parallel-runners ./...

# Everything that needs no KVM; what needs it says so and is run by lab-tests. The time limits are for
# what hangs: a machine on which a system call takes a microsecond needs half as long again as others.
unit: fetch build
	REDOUBT_LAB_LATER=1 $(GO) test -timeout 40m ./...

lab-tests: fetch build guest
	$(LAB) test -timeout 60m $(KVM)

# What fetch brings is nothing that lint reads: they go beside each other.
test:
	@$(MAKE) --no-print-directory -j2 fetch lint
	@$(MAKE) --no-print-directory unit lab-tests

demo: fetch build guest
	@$(GO) build -o $(BIN)/attack-probe ./sandbox/attack/probe
	@$(GO) run ./demo

bench: fetch build guest
	@$(GO) run ./lab/cmd/peers
	REDOUBT_LAB_LATER=1 $(GO) test -run '^$$' -bench '$(BENCH)' -benchtime 5x -timeout 60m ./vtpm/... ./services/netback ./e2e
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime 1s ./store/... ./validation/ext4 ./validation/crossview
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime 5x -timeout 60m ./validation/scan ./network
	$(LAB) test -timeout 60m -bench '$(BENCH)' ./monitor ./e2e

soak: fetch build guest
	REDOUBT_SOAK=1 $(GO) test -run 'Soak' -timeout 6h -v ./e2e
	REDOUBT_SOAK=1 $(GO) test -run 'Soak' -timeout 60m ./validation/...
	REDOUBT_SOAK=1 $(LAB) test -timeout 6h -run 'Soak' ./e2e
	REDOUBT_SOAK=1 $(LAB) test -timeout 2h -bench GuestOverhead ./monitor

# A while of every fuzz target. Go sometimes ends one with its own time limit as the failure ("context deadline exceeded");
# only then is there neither an input that failed nor another message.
fuzz:
	@set -e; out=$$(mktemp); trap 'rm -f "$$out"' EXIT; for f in $$(grep -rl --include='*_test.go' 'func Fuzz' .); do \
	  for t in $$(grep -o 'func Fuzz[A-Za-z0-9_]*' $$f | cut -c6-); do \
	    echo "== $$(dirname $$f) $$t"; \
	    CGO_ENABLED=0 $(GO) test -run '^$$' -fuzz "^$$t$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$(dirname $$f) >"$$out" 2>&1 && cat "$$out" || { \
	      cat "$$out"; \
	      [ "$$(grep -A1 -e '^--- FAIL' "$$out" | grep -v -e '^--- FAIL' | tr -d ' ')" = contextdeadlineexceeded ] || exit 1; \
	      echo "(Go's own time limit: no input failed)"; \
	    }; \
	  done; done

# A command in the nested test machine: make lab CMD='lsmod'
lab: fetch
	@$(LAB) run -- sh -c '$(CMD)'

# The lines of code that run with all privileges.
tcb:
	@$(GO) run ./lab/cmd/tcb

# Regenerates the outer API from api/redoubt/v1/redoubt.proto.
proto:
	$(GO) build -modfile=tools/proto/go.mod -o $(BIN)/proto/ google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go github.com/bufbuild/buf/cmd/buf
	PATH=$(BIN)/proto:$$PATH buf lint
	PATH=$(BIN)/proto:$$PATH buf generate

clean:
	rm -rf $(BIN)
