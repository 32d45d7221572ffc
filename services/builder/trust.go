package builder

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/renameio/v2"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/spec"
)

// Names in the state directory.
const (
	TenantsFile = "tenants.json"
	TrustFile   = "trust.json"
	TenantsDir  = "tenants" // of their toolstacks' records, and in the run directory of their sockets
)

// DefaultTenant is there without being made.
const DefaultTenant = "default"

// A Tenant owns guests. Its toolstack acts on those and on no others.
type Tenant struct {
	Name      string   `json:"name"`
	Pool      string   `json:"pool"`                // beneath which its kernels and disks lie
	Operators []uint32 `json:"operators,omitempty"` // user ids that may do everything, root besides
	Viewers   []uint32 `json:"viewers,omitempty"`   // user ids that may look
}

// Check refuses a tenant that cannot be meant.
func (t *Tenant) Check() error {
	if !spec.ValidName(t.Name) {
		return rpc.Errorf(rpc.Invalid, "tenant %q: use up to 63 lower-case letters, digits and dashes", t.Name)
	}
	if !strings.HasPrefix(t.Pool, "/") {
		return rpc.Errorf(rpc.Invalid, "tenant %s: pool %q is not an absolute path", t.Name, t.Pool)
	}
	return nil
}

// maxTenants bounds them.
const maxTenants = 1024

// ledger is what the Builder knows of tenants for good: who they are, and which guest is whose, the
// trust lists.
type ledger struct {
	stateDir string

	mu      sync.Mutex
	tenants map[string]Tenant
	guests  map[string]string // UUID to tenant
}

type tenantsFile struct {
	Version int      `json:"version"`
	Tenants []Tenant `json:"tenants"`
}

type trustFile struct {
	Version int               `json:"version"`
	Guests  map[string]string `json:"guests"`
}

const ledgerVersion = 1

// openLedger reads both files; a damaged one is refused, never replaced.
func openLedger(stateDir, pool string) (*ledger, error) {
	l := &ledger{stateDir: stateDir, tenants: map[string]Tenant{}, guests: map[string]string{}}
	var t tenantsFile
	if err := l.read(TenantsFile, &t, &t.Version); err != nil {
		return nil, err
	}
	for _, x := range t.Tenants {
		if err := x.Check(); err != nil {
			return nil, fmt.Errorf("%s: %w", l.path(TenantsFile), err)
		}
		l.tenants[x.Name] = x
	}
	if _, ok := l.tenants[DefaultTenant]; !ok {
		l.tenants[DefaultTenant] = Tenant{Name: DefaultTenant, Pool: pool}
	}
	var g trustFile
	if err := l.read(TrustFile, &g, &g.Version); err != nil {
		return nil, err
	}
	maps.Copy(l.guests, g.Guests)
	return l, nil
}

func (l *ledger) path(name string) string { return l.stateDir + "/" + name }

func (l *ledger) read(name string, into any, version *int) error {
	b, err := os.ReadFile(l.path(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err == nil && *version != ledgerVersion {
		err = fmt.Errorf("version %d", *version)
	}
	if err != nil {
		return fmt.Errorf("%s: damaged: %w: restore it from a backup", l.path(name), err)
	}
	return nil
}

func (l *ledger) write(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(l.path(name), append(b, '\n'), 0o600)
}

// all tenants, by name.
func (l *ledger) all() []Tenant {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.SortedFunc(maps.Values(l.tenants), func(a, b Tenant) int { return strings.Compare(a.Name, b.Name) })
}

// set makes a tenant or changes it.
func (l *ledger) set(t Tenant) error {
	if err := t.Check(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	was, had := l.tenants[t.Name]
	if !had && len(l.tenants) >= maxTenants {
		return rpc.Errorf(rpc.Unavailable, "there are %d tenants", maxTenants)
	}
	l.tenants[t.Name] = t
	if err := l.saveTenants(); err != nil {
		delete(l.tenants, t.Name)
		if had {
			l.tenants[t.Name] = was
		}
		return err
	}
	return nil
}

// saveTenants writes them; l.mu is held.
func (l *ledger) saveTenants() error {
	f := tenantsFile{Version: ledgerVersion}
	for _, name := range slices.Sorted(maps.Keys(l.tenants)) {
		f.Tenants = append(f.Tenants, l.tenants[name])
	}
	return l.write(TenantsFile, f)
}

// remove forgets a tenant that has no guests.
func (l *ledger) remove(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.tenants[name]
	switch {
	case !ok:
		return rpc.Errorf(rpc.NotFound, "tenant %q: no such tenant (see `redoubt tenant list`)", name)
	case name == DefaultTenant:
		return rpc.Errorf(rpc.Invalid, "tenant %s is always there", name)
	}
	for _, owner := range l.guests {
		if owner == name {
			return rpc.Errorf(rpc.Exists, "tenant %s has guests: remove them first (`redoubt --tenant %s ps --all`)", name, name)
		}
	}
	delete(l.tenants, name)
	if err := l.saveTenants(); err != nil {
		l.tenants[name] = t
		return err
	}
	return nil
}

// claim puts a guest on a tenant's trust list, unless it is on another's.
func (l *ledger) claim(uuid, tenant string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch l.guests[uuid] {
	case tenant:
		return nil
	case "":
	default:
		return notTrusted(uuid, tenant)
	}
	if _, ok := l.tenants[tenant]; !ok {
		return rpc.Errorf(rpc.NotFound, "tenant %q: no such tenant", tenant)
	}
	l.guests[uuid] = tenant
	if err := l.write(TrustFile, trustFile{ledgerVersion, l.guests}); err != nil {
		delete(l.guests, uuid)
		return err
	}
	return nil
}

// owner is the tenant whose guest it is; "": nobody's.
func (l *ledger) owner(uuid string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.guests[uuid]
}

// drop takes a guest that is destroyed off its list.
func (l *ledger) drop(uuid string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	owner := l.guests[uuid]
	delete(l.guests, uuid)
	if err := l.write(TrustFile, trustFile{ledgerVersion, l.guests}); err != nil {
		l.guests[uuid] = owner
		return err
	}
	return nil
}

// check refuses a guest that is not on a tenant's trust list.
func (l *ledger) check(uuid, tenant string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.guests[uuid] != tenant {
		return notTrusted(uuid, tenant)
	}
	return nil
}

// notTrusted says the same of a guest that is another's and of one that is not there.
func notTrusted(uuid, tenant string) error {
	return rpc.Errorf(rpc.Refused, "guest %s is not on the trust list of tenant %s", clip(uuid, 64), tenant)
}
