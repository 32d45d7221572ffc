package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

// Users of nobody on the machine.
const (
	acmeOperator = 0x52450101
	acmeViewer   = 0x52450102
	evilOperator = 0x52450103
)

// tenant makes a tenant with a pool in which lie the kernel, the initrd and a disk of its guests.
func (h *host) makeTenant(name string, args ...string) (pool string) {
	h.t.Helper()
	pool = h.path(name)
	if err := os.Mkdir(pool, 0o755); err != nil {
		h.t.Fatal(err)
	}
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		h.t.Fatal(err)
	}
	for to, from := range map[string]string{"kernel": kernel, "initrd": initrd(h.t, h.cache, debian.Usual, false)} {
		copyFile(h.t, filepath.Join(pool, to), from)
	}
	h.must("disk", "create", filepath.Join(pool, "disk"), "1MiB")
	h.must(append([]string{"tenant", "set", name, "--pool", pool}, args...)...)
	return pool
}

func copyFile(t testing.TB, to, from string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err == nil {
		_, err = io.Copy(out, in)
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestTenantsQEMU: two tenants have guests of the same name and neither sees nor touches the
// other's, by API or files; a viewer may look only; and a toolstack may be killed or replaced while
// its guests run.
func TestTenantsQEMU(t *testing.T) {
	h := newHost(t)
	for _, dir := range []string{h.dir, filepath.Dir(h.dir)} { // others than root come to the API
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	acme := h.makeTenant("acme", "--operator", number(acmeOperator), "--viewer", number(acmeViewer))
	evil := h.makeTenant("evil", "--operator", number(evilOperator))
	as := func(uid uint32, args ...string) result {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		return h.runAs(ctx, uid, "", args...)
	}
	run := func(uid uint32, tenant, pool, disk string) result {
		return as(uid, "--tenant", tenant, "run", "--name", "web", "--emulator", "qemu", "--kernel", pool+"/kernel",
			"--initrd", pool+"/initrd", "--disk", disk, "--memory", "256MiB", "--cmdline", debian.Cmdline+" e2e=deaf")
	}
	good := func(r result) string {
		t.Helper()
		if r.status != 0 {
			t.Fatalf("%s%s", r.out, r.err)
		}
		return r.out
	}
	refused := func(want string, r result) {
		t.Helper()
		if r.status == 0 || !strings.Contains(r.err, want) {
			t.Errorf("exit status %d, want %q: %s%s", r.status, want, r.out, r.err)
		}
	}
	good(run(acmeOperator, "acme", acme, acme+"/disk"))
	good(as(acmeOperator, "--tenant", "acme", "stop", "web", "--grace", "0s"))
	good(as(acmeOperator, "--tenant", "acme", "run", "web")) // its first end is no news any more
	good(run(evilOperator, "evil", evil, evil+"/disk"))      // of the same name

	// By API.
	for _, uid := range []uint32{acmeOperator, acmeViewer} {
		refused("has no part in tenant evil", as(uid, "--tenant", "evil", "ps"))
		refused("has no part in tenant default", as(uid, "ps"))
	}
	refused("has no part in tenant acme", as(evilOperator, "--tenant", "acme", "stop", "web", "--grace", "0s"))
	refused("may look at tenant acme only", as(acmeViewer, "--tenant", "acme", "stop", "web"))
	refused("may look at tenant acme only", as(acmeViewer, "--tenant", "acme", "console", "web"))
	refused("may look at tenant acme only", as(acmeViewer, "--tenant", "acme", "inspect", "web", "tasks"))
	refused("may look at tenant acme only", as(acmeViewer, "--tenant", "acme", "modules", "web"))
	refused("root's alone", as(acmeOperator, "tenant", "set", "acme", "--viewer", "1"))
	if out := good(as(acmeViewer, "--tenant", "acme", "ps")); strings.Count(out, "web") != 1 {
		t.Error(out)
	}
	if out := h.must("ps", "--all"); strings.Contains(out, "web") {
		t.Errorf("the default tenant sees others' guests: %s", out)
	}

	// By files: acme's by name, and by a link in evil's own pool.
	good(as(evilOperator, "--tenant", "evil", "stop", "web", "--grace", "0s"))
	refused("outside the pool", run(evilOperator, "evil", evil, acme+"/disk"))
	if err := os.Symlink(acme, evil+"/way"); err != nil {
		t.Fatal(err)
	}
	spec := evil + "/guest.yaml"
	text := "name: web\nemulator: qemu\nmemory: 256MiB\nboot: {kernel: " + evil + "/kernel, initrd: " + evil + "/initrd}\ndisks: [{path: " + evil + "/way/disk}]\n"
	if err := os.WriteFile(spec, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	// The command line settles links before it sends names; a caller of its own making does not.
	refused("outside the pool", as(evilOperator, "--tenant", "evil", "run", spec))

	// A toolstack that dies, and one that is replaced, finds its guest as it is.
	h.awaitTenant("acme", "web", "READY")
	h.killTenant("acme")
	if out := h.awaitTenant("acme", "web", "READY"); !strings.Contains(out, "AGG ") {
		t.Errorf("the console is lost: %s", out)
	}
	h.must("reset", "toolstack", "acme.web")
	if out := good(as(acmeOperator, "--tenant", "acme", "show", "web", "--json")); !strings.Contains(out, `"running"`) || !strings.Contains(out, `"vtpm-ready"`) {
		t.Errorf("the guest's state or timeline is lost: %s", out)
	}
	good(as(acmeOperator, "--tenant", "acme", "stop", "web", "--grace", "0s"))
	refused("has guests", h.run("tenant", "rm", "acme"))
	good(as(acmeOperator, "--tenant", "acme", "rm", "web"))
	h.must("tenant", "rm", "acme")
	refused(`no tenant "acme"`, as(acmeOperator, "--tenant", "acme", "ps"))
	if out := h.must("audit", "verify"); out == "" {
		t.Error("no word of the audit log")
	}
}

func TestTenantsNetworksQEMU(t *testing.T) { tenantsNetworks(t, "qemu") }

func TestTenantsNetworksNative(t *testing.T) {
	lab.NeedsKVM(t)
	tenantsNetworks(t, "native")
}

// tenantsNetworks: two tenants have guests with the same VLAN, MAC and IP addresses. Each one's
// guests reach each other, and nothing of the other's, and so do those outside who come by one's uplink;
// and one's NetBack may be killed, replaced and end with its tenant without a word to the other's.
func tenantsNetworks(t *testing.T, emulator string) {
	uplink, outside := newUplink(t)
	h := newHost(t, "--uplink", "acme="+uplink+":10", "--reset", "netback=off")
	h.makeTenant("acme")
	h.makeTenant("same") // a pool for the default tenant's
	tenants := map[string]string{"default": h.path("same"), "acme": h.path("acme")}
	visitors := map[string]string{}
	for _, name := range []string{"host", "visitor"} {
		for tenant, pool := range tenants {
			mac := map[string]string{"host": "1", "visitor": "2"}[name]
			h.must("--tenant", tenant, "run", "--name", name, "--emulator", emulator, "--kernel", pool+"/kernel",
				"--initrd", pool+"/initrd", "--memory", "256MiB", "--no-tpm", "--nic", "vlan=10,mac=02:00:00:00:00:0"+mac,
				"--cmdline", debian.Cmdline+" e2e=net net="+name+" who="+tenant)
		}
	}
	rounds := func(tenant string, more int) string {
		t.Helper()
		return h.awaitTenant(tenant, "visitor", fmt.Sprintf("ROUND %d ", more+strings.Count(visitors[tenant], "ROUND ")))
	}
	for tenant := range tenants {
		visitors[tenant] = rounds(tenant, 3)
	}
	who := func() string {
		t.Helper()
		var text []byte
		err := outside.Do(func() error {
			c, err := net.DialTimeout("tcp", "192.0.2.1:5003", time.Minute)
			if err != nil {
				return err
			}
			text, err = io.ReadAll(c)
			return errors.Join(err, c.Close())
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	if got := who(); got != "acme" {
		t.Errorf("acme's uplink leads to %q", got)
	}
	h.must("services") // as declared
	others := h.process("redoubt-netback")
	if err := unix.Kill(h.process("netback-acme"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	visitors["acme"] = rounds("acme", 3)
	if out := h.must("reset", "netback", "acme.host"); !strings.Contains(out, "1 replaced") {
		t.Error(out)
	}
	for tenant := range tenants {
		visitors[tenant] = rounds(tenant, 3)
	}
	if now := h.process("redoubt-netback"); now != others {
		t.Errorf("the default tenant's NetBack was replaced: %d, then %d", others, now)
	}
	for guest, want := range map[string]int{"host": 1, "visitor": 1, "acme.host": 3, "acme.visitor": 3} {
		if n := h.instances(guest, "netback"); n != want {
			t.Errorf("the audit log has %s depend on %d NetBacks, want %d", guest, n, want)
		}
	}
	for tenant, other := range map[string]string{"default": "acme", "acme": "default"} {
		said := visitors[tenant]
		if strings.Contains(said, " "+other+" ") || !strings.Contains(said, " "+tenant+" ") {
			t.Errorf("%s's visitor met the wrong host:\n%s", tenant, lastLines(said, 20))
		}
		if strings.Contains(said, " answered") != (tenant == "default") {
			t.Errorf("%s's visitor and the default tenant's address:\n%s", tenant, lastLines(said, 20))
		}
	}
	if got := who(); got != "acme" {
		t.Errorf("acme's uplink leads to %q", got)
	}
	if out := h.must("reset", "netback"); !strings.Contains(out, "2 replaced") {
		t.Error(out)
	}
	for _, name := range []string{"host", "visitor"} {
		h.must("--tenant", "acme", "stop", name, "--grace", "0s")
		h.must("--tenant", "acme", "rm", name)
	}
	h.must("tenant", "rm", "acme")
	if _, err := netlink.LinkByName(uplink); err != nil {
		t.Errorf("acme is gone, its uplink did not come back: %v", err)
	}
	visitors["default"] = rounds("default", 2)
}

// awaitTenant waits for output of a tenant's guest, which its log may hold already.
func (h *host) awaitTenant(tenant, name, want string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	out, end := h.stream(ctx, "--tenant", tenant, "logs", name, "--follow")
	defer end()
	var seen strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		seen.Write(buf[:n])
		if strings.Contains(seen.String(), want) {
			return seen.String()
		}
		if err != nil {
			h.t.Fatalf("%s.%s: no %q: %s", tenant, name, want, seen.String())
		}
	}
}

// killTenant kills a tenant's toolstack. Who calls then waits in the queue of its socket for the
// next one.
func (h *host) killTenant(tenant string) {
	h.t.Helper()
	var all []struct {
		Label string `json:"label"`
		PID   int    `json:"pid"`
	}
	if err := json.Unmarshal([]byte(h.must("services", "--json")), &all); err != nil {
		h.t.Fatal(err)
	}
	for _, p := range all {
		if p.Label == "toolstack-"+tenant {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
				h.t.Fatal(err)
			}
			return
		}
	}
	h.t.Fatalf("no toolstack of %s: %v", tenant, all)
}

func number(uid uint32) string { return strconv.FormatUint(uint64(uid), 10) }
