package scan

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/validation/baseline"
)

// A debianRoot is the image of a root file system of real Debian packages, as unpacked, and of what installing them and running
// them adds.
type debianRoot struct {
	t     *testing.T
	tree  string
	image string
	count int
}

func newDebianRoot(t *testing.T) *debianRoot {
	t.Helper()
	cache, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	r := &debianRoot{t: t, tree: cache.Guest(), image: filepath.Join(t.TempDir(), "root.img")}
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", r.tree, r.image, "400M")
	return r
}

// does changes the image: "PATH TEXT" writes a file, which may be there, as root's with mode 0644; what begins with ! is debugfs' own.
func (r *debianRoot) does(changes ...string) {
	r.t.Helper()
	var script []string
	made := map[string]bool{}
	for _, c := range changes {
		if command, ok := strings.CutPrefix(c, "!"); ok {
			script = append(script, command)
			continue
		}
		path, text, _ := strings.Cut(c, " ")
		for i, letter := range path {
			if dir := path[:i]; i > 0 && letter == '/' && !made[dir] {
				made[dir] = true
				script = append(script, "mkdir "+dir) // where there is one it only says so
			}
		}
		r.count++
		from := filepath.Join(r.t.TempDir(), fmt.Sprint(r.count))
		put(r.t, from, []byte(text))
		script = append(script, "rm "+path, "write "+from+" "+path)
	}
	for _, line := range strings.Split(debugfs(r.t, r.image, script...), "\n") {
		if line != "" && !strings.Contains(line, "File not found by ext2_lookup") && !strings.Contains(line, "already exists") {
			r.t.Fatalf("debugfs: %s", line)
		}
	}
}

func (r *debianRoot) scan() *Index {
	r.t.Helper()
	f, err := os.Open(r.image)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		r.t.Fatal(err)
	}
	rules := baseline.DefaultRules()
	got, err := Run(r.t.Context(), []Source{{Reader: f, Size: st.Size()}}, rules.Digest(), rules, nil, Options{})
	if err != nil || len(got.Problems) > 0 {
		r.t.Fatalf("%v, %v", got.Problems, err)
	}
	return got.Index
}

// ruled are the files in the baseline, and the rule of each.
func ruled(x *Index) map[string]string {
	all := map[string]string{}
	for e := range x.All() {
		if rule := baseline.DefaultRules().RuleOf(e); rule != "" {
			all[e.Path] = rule
		}
	}
	return all
}

func (r *debianRoot) baseline() *baseline.Baseline {
	r.t.Helper()
	rules := baseline.DefaultRules()
	var text bytes.Buffer
	h := baseline.Header{Guest: "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01", Version: 1, Created: time.Unix(1, 0).UTC(), Rules: rules}
	if err := baseline.Write(&text, h, rules.Kept(r.scan().All())); err != nil {
		r.t.Fatal(err)
	}
	b, err := baseline.Open(text.Bytes())
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// deviates compares what was changed with what should be found: "SEVERITY KIND PATH (RULE)".
func (r *debianRoot) deviates(b *baseline.Baseline, want ...string) {
	r.t.Helper()
	c, err := baseline.Compare(b, r.scan().All(), nil, 1000)
	if err != nil {
		r.t.Fatal(err)
	}
	got := map[string]bool{}
	for _, f := range c.Findings {
		got[fmt.Sprintf("%s %s %s (%s)", f.Severity, f.Kind, f.Name.Path, f.Rule)] = true
	}
	for _, w := range want {
		if !got[w] {
			r.t.Errorf("not found: %s", w)
		}
		delete(got, w)
	}
	for _, w := range slices.Sorted(maps.Keys(got)) {
		r.t.Errorf("found, and should not be: %s", w)
	}
}

// installed is what installing the packages, and their first start, would have left.
var installed = []string{
	"/etc/passwd root:x:0:0::/root:/bin/bash", "/etc/shadow root:*:1::::::", "/etc/group root:x:0:", "/etc/gshadow root:*::",
	"/etc/pam.d/common-auth auth required pam_unix.so", "/etc/ssh/sshd_config Port 22", "/etc/ssh/ssh_host_ed25519_key key",
	"/etc/sudoers.d/admin admin ALL=(ALL) ALL", "/root/.ssh/authorized_keys ssh-ed25519 A", "/home/u/.ssh/authorized_keys ssh-ed25519 B",
	"/var/spool/cron/crontabs/root 0 0 * * * true", "/etc/ld.so.cache cache", "/etc/fstab UUID=1 / ext4", "/etc/machine-id 1", "/etc/hostname web",
	"!mkdir /etc/lvm", "!mkdir /etc/multipath", "!mkdir /etc/zfs", "!mkdir /etc/apt/sources.list.d",
	"!mkdir /etc/systemd/system/multi-user.target.wants", "!symlink /etc/systemd/system/multi-user.target.wants/ssh.service /lib/systemd/system/ssh.service",
	"!symlink /etc/alternatives/awk /usr/bin/mawk", "/var/lib/dpkg/info/sudo.postinst #!/bin/sh", "/var/lib/dpkg/status Package: sudo",
	"/boot/vmlinuz-6.1.0-18-amd64 kernel", "/boot/grub/grub.cfg menu", "/boot/grub/grubenv env", "/root/.bashrc alias", "!mkdir /root/.vim", "/home/u/.bashrc alias",
	"/var/log/syslog log", "/etc/resolv.conf nameserver", "/etc/letsencrypt/renewal/web.conf conf", "/etc/letsencrypt/live/web/cert.pem cert",
}

// TestDebianCovered: of real packages all that runs and all that decides who may do what is in the baseline; documents, and what
// changes by itself, is not.
func TestDebianCovered(t *testing.T) {
	r := newDebianRoot(t)
	r.does(installed...)
	x := r.scan()
	rule := ruled(x)
	entries := 0
	err := filepath.WalkDir(r.tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n := "/" + strings.TrimPrefix(strings.TrimPrefix(path, r.tree), "/")
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		entries++
		var begin [4]byte
		if d.Type().IsRegular() {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			_, _ = f.Read(begin[:]) // a short one is no program
			f.Close()
		}
		document := strings.HasPrefix(n, "/usr/share/doc/") || strings.HasPrefix(n, "/usr/share/bug/") // which reportbug runs, as a user
		runs := d.Type().IsRegular() && (st.Mode&0o111 != 0 || string(begin[:2]) == "#!" || string(begin[:]) == "\x7fELF")
		decides := slices.ContainsFunc([]string{
			"/lib/systemd/", "/usr/lib/systemd/", "/etc/systemd/", "/etc/cron", "/etc/ssh/", "/etc/pam.d/", "/etc/security/", "/etc/init.d/", "/lib/udev/",
			"/usr/lib/tmpfiles.d/", "/usr/lib/sysusers.d/", "/etc/profile", "/etc/bash", "/usr/share/bash-completion/", "/etc/apt/", "/etc/sudo",
			"/usr/lib/python3/", "/usr/share/pam/", "/usr/share/unattended-upgrades/",
		}, func(p string) bool { return strings.HasPrefix(n, p) }) && !d.IsDir()
		switch got := rule[n]; {
		case (runs || decides) && !document && got == "":
			t.Errorf("%s (%o) is in no rule", n, st.Mode)
		case document && st.Mode&(unix.S_ISUID|unix.S_ISGID) == 0 && got != "":
			t.Errorf("%s is in the rule %s", n, got)
		case st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 && d.Type().IsRegular():
			e, _ := x.Lookup(baseline.Name{Volume: "disk0", Path: n})
			if e.Mode != st.Mode || e.UID != st.Uid || e.GID != st.Gid || e.Digest == (baseline.Digest{}) {
				t.Errorf("%s: it is %+v, not %o %d:%d with a digest", n, e, st.Mode, st.Uid, st.Gid)
			}
		}
		return nil
	})
	if err != nil || entries < 2000 {
		t.Fatalf("%d names: %v", entries, err)
	}
	for path, want := range map[string]string{
		"/bin/su": "programs", "/usr/bin/sudo": "programs", "/usr/bin/passwd": "programs", "/usr/lib/openssh/ssh-keysign": "programs",
		"/etc/passwd": "access", "/etc/shadow": "access", "/etc/group": "access", "/etc/sudoers.d/admin": "access", "/etc/pam.d/common-auth": "access",
		"/etc/pam.d/sshd": "access", "/root/.ssh/authorized_keys": "access", "/home/u/.ssh/authorized_keys": "access", "/etc/ssh/ssh_host_ed25519_key": "access",
		"/var/spool/cron/crontabs/root": "cron", "/etc/crontab": "cron", "/etc/cron.daily/dpkg": "cron",
		"/lib/systemd/system/ssh.service": "programs", "/etc/systemd/system/multi-user.target.wants/ssh.service": "services",
		"/etc/alternatives/awk": "programs", "/etc/ld.so.cache": "linker", "/var/lib/dpkg/info/sudo.postinst": "packages",
		"/boot/vmlinuz-6.1.0-18-amd64": "boot", "/boot/grub/grub.cfg": "boot", "/root/.bashrc": "shells", "/home/u/.bashrc": "users-shells",
		"/usr/share/bash-completion/bash_completion": "shared-programs", "/usr/share/unattended-upgrades/unattended-upgrade-shutdown": "shared-programs",
		"/etc/letsencrypt/renewal/web.conf": "configuration",
		"/var/log/syslog":                   "", "/etc/resolv.conf": "", "/boot/grub/grubenv": "", "/etc/machine-id": "", "/var/lib/dpkg/status": "",
		"/etc/letsencrypt/live/web/cert.pem": "", "/usr/share/doc/sudo/copyright": "", "/usr/share/man/man8/sudo.8.gz": "",
	} {
		if rule[path] != want {
			t.Errorf("%s is in the rule %q, not %q", path, rule[path], want)
		}
	}
}

// TestDebianOrdinary: nothing that changes in ordinary use deviates.
func TestDebianOrdinary(t *testing.T) {
	r := newDebianRoot(t)
	r.does(installed...)
	b := r.baseline()
	r.does(
		"/var/log/syslog more", "/var/log/wtmp w", "/var/log/journal/1/system.journal j", "/var/log/apt/history.log h",
		"/var/lib/systemd/random-seed seed", "/var/lib/systemd/timers/stamp-apt-daily.timer s", "/var/lib/logrotate/status s", "/var/lib/dpkg/status Package: more",
		"/var/lib/dpkg/lock l", "/var/lib/apt/lists/partial/x x", "/var/lib/sudo/lectured/u l", "/var/lib/private/x x", "/var/lib/postgresql/15/main/base/1 b",
		"/var/cache/apt/pkgcache.bin p", "/var/cache/ldconfig/aux-cache a", "/var/cache/man/index.db m", "/var/tmp/x x", "/tmp/x #!/bin/sh", "/run/utmp u",
		"/var/mail/root m", "/var/spool/mail/u m", "/var/backups/dpkg.status.0 b", "/home/u/.bash_history ls", "/home/u/notes n", "/home/u/.ssh/known_hosts k",
		"/home/u/.cache/x x", "/home/u/.config/app.conf c", "/home/u/bin/tool #!/bin/sh", "/root/.bash_history ls", "/root/.viminfo v", "/root/.vim/.netrwhist n", "/root/.lesshst l",
		"/root/.ssh/known_hosts k", "/root/.cache/x x", "/etc/resolv.conf nameserver other", "/etc/machine-id 2", "/etc/adjtime 0.0", "/etc/.pwd.lock l",
		"/etc/fake-hwclock.data 2026", "/etc/mtab m", "/boot/grub/grubenv env2", "/srv/www/index.html h", "/opt/app/data d", "/etc/letsencrypt/live/web/cert.pem next",
		"/etc/letsencrypt/archive/web/cert2.pem next", "/etc/lvm/archive/vg_1.vg a", "/etc/multipath/wwids w", "/etc/zfs/zpool.cache z",
		"/usr/share/mime/mime.cache m", "/usr/share/info/dir d", "/usr/share/doc/x/README r", "/usr/share/GeoIP/GeoIP.dat g",
		"!mkdir /var/log/journal/2", "!sif /var/log/journal/2 mode 042755", "!sif /etc/passwd atime @5", "!sif /etc/passwd mtime @5",
	)
	r.deviates(b)
}

// TestDebianTampered: what an attacker does to such a system is found, as severe as it is.
func TestDebianTampered(t *testing.T) {
	r := newDebianRoot(t)
	r.does(installed...)
	b := r.baseline()
	capability := filepath.Join(t.TempDir(), "capability")
	put(t, capability, []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}) // cap_net_raw=ep, version 2
	r.does(
		"/etc/ld.so.preload /tmp/evil.so", "/etc/cron.d/evil * * * * * root evil", "/var/spool/cron/crontabs/root evil", "/etc/systemd/system/evil.service [Service]",
		"/lib/systemd/system/ssh.service [Service]", "/lib/systemd/system-generators/evil #!/bin/sh", "/etc/pam.d/common-auth auth sufficient pam_permit.so",
		"/etc/ssh/sshd_config PermitRootLogin yes", "/root/.ssh/authorized_keys evil", "/home/u/.ssh/authorized_keys evil", "/home/u/.ssh/rc evil",
		"/etc/sudoers.d/evil evil ALL=(ALL) NOPASSWD: ALL", "/etc/passwd root2:x:0:0", "/usr/share/bash-completion/bash_completion evil",
		"/etc/update-motd.d/00-evil #!/bin/sh", "/var/lib/dpkg/info/sudo.postinst evil", "/etc/apt/sources.list.d/evil.list deb evil", "/etc/profile.d/evil.sh evil",
		"/root/.vimrc evil", "/home/u/.bashrc evil", "/etc/hostname evil", "/etc/letsencrypt/renewal/web.conf renew_hook = evil", "/boot/grub/grub.cfg evil",
		"/lib/udev/rules.d/99-evil.rules RUN", "/usr/lib/python3/dist-packages/evil.pth import evil", "/etc/sysctl.d/99-evil.conf kernel.modules_disabled=0",
		"/tmp/shell shell", "!sif /tmp/shell mode 0104755", "/home/u/tool tool", "!sif /home/u/tool mode 0100755", "!ea_set -f "+capability+" /home/u/tool security.capability",
		"!mkdir /var/x", "!cd /var/x", "!mknod disk b 8 0", "!cd /", "!rm /usr/sbin/sshd", "!sif /etc/shadow mode 0100666", "!sif /bin/su uid 1000",
		"!ea_set -f "+capability+" /bin/ping security.capability",
	)
	r.deviates(b,
		"critical added /etc/ld.so.preload (linker)", "critical added /etc/cron.d/evil (cron)", "critical content /var/spool/cron/crontabs/root (cron)",
		"critical added /etc/systemd/system/evil.service (services)", "critical content /lib/systemd/system/ssh.service (programs)",
		"critical added /lib/systemd/system-generators/evil (programs)", "critical content /etc/pam.d/common-auth (access)", "critical content /etc/ssh/sshd_config (access)",
		"critical content /root/.ssh/authorized_keys (access)", "critical content /home/u/.ssh/authorized_keys (access)", "critical added /home/u/.ssh/rc (access)",
		"critical added /etc/sudoers.d/evil (access)", "critical content /etc/passwd (access)", "critical content /usr/share/bash-completion/bash_completion (shared-programs)",
		"critical added /etc/update-motd.d/00-evil (services)", "critical content /var/lib/dpkg/info/sudo.postinst (packages)",
		"critical added /etc/apt/sources.list.d/evil.list (packages)", "critical added /etc/profile.d/evil.sh (shells)", "critical added /root/.vimrc (shells)",
		"warning content /home/u/.bashrc (users-shells)", "warning content /etc/hostname (configuration)", "warning content /etc/letsencrypt/renewal/web.conf (configuration)",
		"critical content /boot/grub/grub.cfg (boot)", "critical added /lib/udev/rules.d/99-evil.rules (programs)",
		"critical added /usr/lib/python3/dist-packages/evil.pth (programs)", "critical added /etc/sysctl.d/99-evil.conf (kernel-modules)",
		"critical added /tmp/shell (rights-anywhere)", "critical setuid /tmp/shell (rights-anywhere)", "critical added /home/u/tool (rights-anywhere)",
		"critical capability /home/u/tool (rights-anywhere)", "critical added /var/x/disk (devices-anywhere)", "critical device /var/x/disk (devices-anywhere)",
		"critical removed /usr/sbin/sshd (programs)", "critical metadata /etc/shadow (access)", "critical metadata /bin/su (programs)",
		"critical capability /bin/ping (programs)",
	)
}
