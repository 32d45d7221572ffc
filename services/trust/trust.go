// Package trust is what the Builder knows of tenants for good: who they are, and which guest is whose,
// the trust lists. A change is on the disk before it is in force; a damaged file is refused, never
// replaced.
package trust

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
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/spec"
)

// Names in the state directory.
const (
	TenantsFile = "tenants.json"
	TrustFile   = "trust.json"
)

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

// A Ledger is the two files of a state directory. Its methods may be called concurrently.
type Ledger struct {
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

// Open reads both files; pool is the default tenant's where none is written down.
func Open(stateDir, pool string) (*Ledger, error) {
	l := &Ledger{stateDir: stateDir, tenants: map[string]Tenant{}, guests: map[string]string{}}
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
	if _, ok := l.tenants[services.DefaultTenant]; !ok {
		l.tenants[services.DefaultTenant] = Tenant{Name: services.DefaultTenant, Pool: pool}
	}
	var g trustFile
	if err := l.read(TrustFile, &g, &g.Version); err != nil {
		return nil, err
	}
	maps.Copy(l.guests, g.Guests)
	return l, nil
}

func (l *Ledger) path(name string) string { return l.stateDir + "/" + name }

func (l *Ledger) read(name string, into any, version *int) error {
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

func (l *Ledger) write(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(l.path(name), append(b, '\n'), 0o600)
}

// All tenants, by name.
func (l *Ledger) All() []Tenant {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.SortedFunc(maps.Values(l.tenants), func(a, b Tenant) int { return strings.Compare(a.Name, b.Name) })
}

// Set makes a tenant or changes it.
func (l *Ledger) Set(t Tenant) error {
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
func (l *Ledger) saveTenants() error {
	f := tenantsFile{Version: ledgerVersion}
	for _, name := range slices.Sorted(maps.Keys(l.tenants)) {
		f.Tenants = append(f.Tenants, l.tenants[name])
	}
	return l.write(TenantsFile, f)
}

// Remove forgets a tenant that has no guests.
func (l *Ledger) Remove(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.tenants[name]
	switch {
	case !ok:
		return rpc.Errorf(rpc.NotFound, "tenant %q: no such tenant (see `redoubt tenant list`)", name)
	case name == services.DefaultTenant:
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

// Claim puts a guest on a tenant's trust list, unless it is on another's.
func (l *Ledger) Claim(uuid, tenant string) error {
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

// Owner is the tenant whose guest it is; "": nobody's.
func (l *Ledger) Owner(uuid string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.guests[uuid]
}

// Drop takes a guest that is destroyed off its list.
func (l *Ledger) Drop(uuid string) error {
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

// Check refuses a guest that is not on a tenant's trust list.
func (l *Ledger) Check(uuid, tenant string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.guests[uuid] != tenant {
		return notTrusted(uuid, tenant)
	}
	return nil
}

// notTrusted says the same of a guest that is another's and of one that is not there.
func notTrusted(uuid, tenant string) error {
	return rpc.Errorf(rpc.Refused, "guest %s is not on the trust list of tenant %s", uuid[:min(len(uuid), 64)], tenant)
}

// Tenant is what is written down of one.
func (l *Ledger) Tenant(name string) (Tenant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.tenants[name]
	if !ok {
		return t, rpc.Errorf(rpc.NotFound, "tenant %q: no such tenant", name)
	}
	return t, nil
}
