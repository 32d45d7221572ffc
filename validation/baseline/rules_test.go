package baseline

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	regular   = unix.S_IFREG | 0o644
	program   = unix.S_IFREG | 0o755
	setuid    = unix.S_IFREG | 0o4755
	directory = unix.S_IFDIR | 0o755
	block     = unix.S_IFBLK | 0o660
)

func mustRules(t testing.TB, text string) *Rules {
	t.Helper()
	r, err := ParseRules([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestDefaultRules: what a Debian administrator would expect of each of these files.
func TestDefaultRules(t *testing.T) {
	r := DefaultRules()
	const none = "-"
	for _, c := range []struct {
		path string
		mode uint32
		rule string
		want Want
	}{
		{"/bin/ls", program, "programs", checkAll},
		{"/usr/bin", directory, "programs", Descend | Metadata | Xattrs},
		{"/usr/lib/x86_64-linux-gnu/libc.so.6", program, "programs", checkAll},
		{"/usr/local/lib/python3.11/dist-packages/x.py", regular, "programs", checkAll},
		{"/usr/libexec/sudo/sesh", program, "programs", checkAll},
		{"/etc/alternatives/awk", unix.S_IFLNK | 0o777, "programs", Metadata | Xattrs},
		{"/lib64", unix.S_IFLNK | 0o777, "programs", Metadata | Xattrs},
		{"/usr/lib/python3/dist-packages/__pycache__/apt.cpython-311.pyc", regular, "python-caches", checkAll},
		{"/boot/vmlinuz-6.1.0-18-amd64", regular, "boot", checkAll},
		{"/boot/grub/grub.cfg", regular, "boot", checkAll},
		{"/boot/grub/grubenv", regular, none, Metadata | Xattrs},
		{"/vmlinuz-6.1.0-18-amd64", regular, "boot", checkAll}, // a partition for /boot
		{"/initrd.img-6.1.0-18-amd64", regular, "boot", checkAll},
		{"/EFI/debian/grubx64.efi", program, "boot", checkAll},
		{"/lib/modules/6.1.0-18-amd64/kernel/fs/fuse/fuse.ko", regular, "kernel-modules", checkAll},
		{"/usr/lib/modules/6.1.0-18-amd64/modules.dep", regular, "kernel-modules", checkAll},
		{"/etc/modprobe.d/blacklist.conf", regular, "kernel-modules", checkAll},
		{"/etc/systemd/system/x.service", regular, "services", checkAll},
		{"/lib/systemd/system-generators/x", program, "programs", checkAll},
		{"/etc/rc.local", program, "services", checkAll},
		{"/home/anna/.config/systemd/user/x.service", regular, "services", checkAll},
		{"/etc/cron.d/x", regular, "cron", checkAll},
		{"/var/spool/cron/crontabs/root", regular, "cron", checkAll},
		{"/etc/ssh/sshd_config", regular, "access", checkAll},
		{"/root/.ssh/authorized_keys", regular, "access", checkAll},
		{"/home/anna/.ssh/authorized_keys", regular, "access", checkAll},
		{"/anna/.ssh/authorized_keys", regular, "access", checkAll}, // a partition for /home
		{"/home/anna/.ssh/known_hosts", regular, none, Metadata | Xattrs},
		{"/etc/pam.d/sshd", regular, "access", checkAll},
		{"/etc/nsswitch.conf", regular, "access", checkAll},
		{"/etc/shadow", regular, "access", checkAll},
		{"/etc/sudoers.d/x", regular, "access", checkAll},
		{"/etc/ld.so.preload", regular, "linker", checkAll},
		{"/etc/ld.so.cache", regular, "linker", checkAll},
		{"/etc/profile.d/x.sh", regular, "shells", checkAll},
		{"/root/.bashrc", regular, "shells", checkAll},
		{"/root/.bash_history", regular, none, Metadata | Xattrs},
		{"/home/anna/.bashrc", regular, "users-shells", checkAll},
		{"/etc/apt/sources.list.d/x.list", regular, "packages", checkAll},
		{"/usr/share/keyrings/x.gpg", regular, "packages", checkAll},
		{"/etc/udev/rules.d/x.rules", regular, "udev", checkAll},
		{"/etc/hosts", regular, "configuration", checkAll},
		{"/etc", directory, "configuration", Descend | Metadata | Xattrs},
		{"/etc/mtab", regular, none, Metadata | Xattrs},
		{"/etc/machine-id", regular, none, Metadata | Xattrs},
		{"/etc/adjtime", regular, none, Metadata | Xattrs},
		{"/etc/resolv.conf", unix.S_IFLNK | 0o777, none, 0},
		{"/var/log/syslog", regular, none, Metadata | Xattrs}, // it may have capabilities
		{"/var/log", directory, none, Descend},
		{"/var/mail", unix.S_IFDIR | 0o2775, none, Descend}, // a directory's bit gives nobody rights
		{"/tmp/.x", setuid, "rights-anywhere", checkAll},
		{"/tmp/disk", block, "devices-anywhere", Metadata | Xattrs},
		{"/dev/sda", block, none, 0},
		{"/dev/shm/x", setuid, "rights-anywhere", checkAll},
		{"/", directory, none, Descend},
	} {
		e := Entry{Name: Name{"disk0p1", c.path}, Mode: c.mode}
		rule := r.RuleOf(e)
		if rule == "" {
			rule = none
		}
		if got := r.Want(e.Name, c.mode); rule != c.rule || got != c.want {
			t.Errorf("%s: rule %s, wanted %04b; expected %s, %04b", c.path, rule, got, c.rule, c.want)
		}
	}
	capable := Entry{Name: Name{"disk0", "/var/tmp/x"}, Mode: program, Xattrs: []Xattr{{capability, "\x01"}}, Digest: Digest{1}}
	if got, ok := r.Reduce(capable); !ok || r.RuleOf(capable) != "rights-anywhere" || got.Digest != (Digest{}) {
		t.Errorf("a file with capabilities: %v %+v", ok, got)
	}
}

// TestDescend: nothing is entered in which nothing may match.
func TestDescend(t *testing.T) {
	r := mustRules(t, `
rules:
  - {name: vendor, include: [/usr/share/vendor], ignore: true}
  - {name: a, include: [/usr/bin, /home/*/.ssh/keys, /usr/share], exclude: [/usr/share/doc], severity: critical}
  - {name: b, include: ["/srv/**/hook"], volumes: [disk1], severity: info}
`)
	for path, want := range map[string]bool{
		"/": true, "/usr": true, "/usr/bin": true, "/usr/bin/x": true, "/usr/lib": false, "/home": true, "/home/a": true, "/home/a/x": false,
		"/home/a/.ssh": true, "/var": false, "/proc": false, "/srv": false, "/usr/share/doc": false, "/usr/share/doc/x": false,
		"/usr/share/vendor": false, "/usr/share/vendor/x": false,
	} {
		if got := r.Want(Name{"disk0", path}, directory)&Descend != 0; got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
	for path, want := range map[string]bool{"/srv": true, "/srv/a/b": true, "/var": false} {
		if got := r.Want(Name{"disk1", path}, directory)&Descend != 0; got != want {
			t.Errorf("disk1 %s: %v", path, got)
		}
	}
	if w := r.Want(Name{"disk0", "/usr/share/vendor/x"}, setuid); w != 0 {
		t.Errorf("ignored: %b", w)
	}
}

// expression makes a regular expression of a pattern: what the trie must do, said in another way.
func expression(p string) *regexp.Regexp {
	var b strings.Builder
	parts := components(p)
	for i, c := range parts {
		switch {
		case c == "**" && i == len(parts)-1:
			b.WriteString("/[^/]+")
		case c == "**":
			b.WriteString("(?:/[^/]+)*")
		default:
			b.WriteByte('/')
			for i := 0; i < len(c); i++ {
				switch c[i] {
				case '*':
					b.WriteString("[^/]*")
				case '?':
					b.WriteString("[^/]")
				case '\\':
					i++
					fallthrough
				default:
					b.WriteString(regexp.QuoteMeta(c[i : i+1]))
				}
			}
		}
	}
	return regexp.MustCompile("^" + b.String() + "(?:/.*)?$")
}

// TestAgainstExpressions: on random rules and names each name has the rule that regular expressions find, and a walk that
// enters only where Want says Descend misses none.
func TestAgainstExpressions(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	pattern := func() string {
		p := ""
		for last, n := "", 1+rnd.IntN(4); n > 0; n-- {
			c := pick("a", "b", "c", "aa", "*", "a*", "*b", "?", "**", "a?c", "*a*b", `\*`)
			if c == "**" && last == c {
				c = "a"
			}
			p, last = p+"/"+c, c
		}
		return p
	}
	var names []string
	var fill func(string, int)
	fill = func(dir string, depth int) {
		for _, c := range []string{"a", "b", "aa", "abc", "*", "xab"} {
			names = append(names, dir+"/"+c)
			if depth > 1 {
				fill(dir+"/"+c, depth-1)
			}
		}
	}
	fill("", 4)
	matched := 0
	for range 20 {
		var rules []Rule
		for i := range 1 + rnd.IntN(4) {
			r := Rule{Name: fmt.Sprint("r", i), Include: []string{pattern()}, Check: checkAll, Severity: Info, Ignore: rnd.IntN(5) == 0}
			if rnd.IntN(2) == 0 {
				r.Include = append(r.Include, pattern())
			}
			if rnd.IntN(2) == 0 {
				r.Exclude = []string{pattern()}
			}
			if !r.Ignore && rnd.IntN(4) == 0 {
				r.Having = SetUID
			}
			rules = append(rules, r)
		}
		compiled := compile(rules)
		expressions := make([][2][]*regexp.Regexp, len(rules))
		for i, r := range rules {
			for _, p := range r.Include {
				expressions[i][0] = append(expressions[i][0], expression(p))
			}
			for _, p := range r.Exclude {
				expressions[i][1] = append(expressions[i][1], expression(p))
			}
		}
		entered := map[string]bool{"": compiled.Want(Name{"disk0", "/"}, directory)&Descend != 0}
		for _, n := range names {
			any := func(all []*regexp.Regexp) bool {
				return slices.ContainsFunc(all, func(e *regexp.Regexp) bool { return e.MatchString(n) })
			}
			parent := n[:strings.LastIndexByte(n, '/')]
			entered[n] = entered[parent] && compiled.Want(Name{"disk0", n}, directory)&Descend != 0
			for _, mode := range []uint32{regular, setuid} {
				want := ""
				for i, r := range rules {
					if any(expressions[i][0]) && !any(expressions[i][1]) && (r.Having == 0 || mode == setuid) {
						if want = r.Name; r.Ignore {
							want = ""
						}
						break
					}
				}
				e := Entry{Name: Name{"disk0", n}, Mode: mode}
				if got := compiled.RuleOf(e); got != want {
					t.Fatalf("%s %o: rule %q, not %q\n%s", n, mode, got, want, compiled.Encode())
				}
				if want != "" {
					matched++
				}
				if want != "" && !entered[parent] {
					t.Fatalf("%s: %s is not entered\n%s", n, parent, compiled.Encode())
				}
			}
		}
	}
	if matched < 3_000 {
		t.Errorf("only %d matches", matched)
	}
}

// TestRulesErrors: mistakes are named with their line.
func TestRulesErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "line 1: document: empty"},
		{"rules: []", "line 1: rules: none"},
		{"rules: x", "line 1: rules: not a list"},
		{"- a", "line 1: document: not a mapping"},
		{"rule: []", "line 1: rule: no such field: use rules"},
		{"rules:\n  - name: a\n    severity: info\n", "line 2: rules.0.include: it has none"},
		{"rules:\n  - include: [/a]\n    severity: info\n", "line 2: rules.0.name: it has none"},
		{"rules:\n  - name: a\n    include: [/a]\n", "line 2: rules.0.severity: it has none"},
		{"rules:\n  - name: a\n    include: [/a]\n    severity: bad\n", "line 4: rules.0.severity: \"bad\" is no severity: use info, warning, critical"},
		{"rules:\n  - name: A\n", "line 2: rules.0.name: \"A\" is no name"},
		{"rules:\n  - name: a\n    name: b\n", "line 3: rules.0.name: given twice"},
		{"rules:\n  - name: a\n    include: [a]\n", "line 3: rules.0.include: \"a\": begin it with /"},
		{"rules:\n  - name: a\n    include: [/a/]\n", "without //"},
		{"rules:\n  - name: a\n    include: [/a/../b]\n", "without //"},
		{"rules:\n  - name: a\n    include: [/a/**b]\n", "** stands alone"},
		{"rules:\n  - name: a\n    include: [/**/**]\n", "** twice"},
		{"rules:\n  - name: a\n    include: ['/a\\']\n", `\ needs the letter`},
		{"rules:\n  - name: a\n    include: [\"/a\\u202e\"]\n", "cannot be printed"},
		{"rules:\n  - name: a\n    include: [/a, /a]\n", "given twice"},
		{"rules:\n  - name: a\n    include: []\n", "0 values"},
		{"rules:\n  - name: a\n    include: /a\n", "not a list"},
		{"rules:\n  - name: a\n    check: [contents]\n", "no such value \"contents\": use metadata, content, xattrs"},
		{"rules:\n  - name: a\n    having: [suid]\n", "use setuid, setgid, capability, device"},
		{"rules:\n  - name: a\n    ignore: no\n", "use true"},
		{"rules:\n  - {name: a, include: [/a], ignore: true, severity: info}\n", "what is ignored has no"},
		{"rules:\n  - {name: a, include: [/a], severity: info}\n  - {name: a, include: [/a], severity: info}\n", "line 3: rules.1.name: a: another rule has it"},
		{"rules:\n  - {name: a, include: [/a], severity: info, max: 1}\n", "no such field: use name"},
		{"rules: &x\n  - {name: a, include: [/a], severity: info}\n", "not a list"},
		{"rules:\n  - {name: a, include: &x [/a], severity: info}\n  - {name: b, include: *x, severity: info}", "not a list"},
		{"rules:\n  - {name: !x a, include: [/a], severity: info}\n", "not a plain text"},
		{"rules:\n  - {name: a, include: [/a], severity: info}\n---\nrules: []\n", "a second document"},
		{"rules:\n\t- a\n", "line 2"},
		{"rules:\n" + strings.Repeat("  - {name: a, include: [/a], severity: info}\n", 65), "another rule has it|65 rules: the most is 64"},
		{strings.Repeat(" ", MaxRulesFile+1), "the most is"},
		{"rules:\n  - name: a\n    include:\n" + strings.Repeat("      - /a\n", maxPatterns+1), "values: give 1 to"},
		{"rules:\n  - {name: a, severity: info, include: [/" + strings.Repeat("a", maxPattern) + "]}", "the most is"},
		{"rules:\n  - {name: a, severity: info, include: [" + strings.Repeat("/a", maxComponents+1) + "]}", "components"},
		{strings.Repeat("[", 20_000), "document"},
	} {
		_, err := ParseRules([]byte(c.text))
		var at *RulesError
		ok := errors.As(err, &at)
		if ok {
			ok = false
			for _, want := range strings.Split(c.want, "|") {
				ok = ok || strings.Contains(err.Error(), want)
			}
		}
		if !ok {
			t.Errorf("%.80q: %v; want %s", c.text, err, c.want)
		}
	}
}

// TestCanonical: rules that say the same have one canonical form, which is read as the same, and any other digest says
// that something differs.
func TestCanonical(t *testing.T) {
	a := mustRules(t, "rules: [{name: a, include: [/b, /a], check: [xattrs, content, metadata], severity: info}]")
	b := mustRules(t, "# the same\nrules:\n  - include: ['/a', \"/b\"]\n    name: a\n    severity: info\n")
	c := mustRules(t, "rules: [{name: a, include: [/b, /a], severity: warning}]")
	if !bytes.Equal(a.Encode(), b.Encode()) || a.Digest() != b.Digest() {
		t.Errorf("%s\n%s", a.Encode(), b.Encode())
	}
	if a.Digest() == c.Digest() {
		t.Error("the severity is not in the digest")
	}
	again := mustRules(t, string(DefaultRules().Encode()))
	if again.Digest() != DefaultRules().Digest() {
		t.Error("the default rules change when they are written and read")
	}
}

// FuzzRules: whatever is taken for rules is the same rules in its canonical form.
func FuzzRules(f *testing.F) {
	f.Add([]byte("rules: [{name: a, include: [/b, '/**/it''s *'], having: [setuid, capability], check: [content], volumes: [disk0p1], severity: info}]"))
	f.Add([]byte("rules:\n  - name: a\n    include: [/a]\n    exclude: [/a/?\\*]\n    ignore: true\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRules(b)
		if err != nil {
			return
		}
		again, err := ParseRules(r.Encode())
		if err != nil {
			t.Fatalf("%v: %s", err, r.Encode())
		}
		if again.Digest() != r.Digest() {
			t.Fatalf("%s\n%s", r.Encode(), again.Encode())
		}
		for _, rule := range r.All() {
			for _, p := range rule.Include {
				for _, path := range []string{p, p + "/x", "/"} {
					if m := r.root.match(path); m.include != again.root.match(path).include {
						t.Fatalf("%s: %v", path, m)
					}
				}
			}
		}
	})
}

// BenchmarkWant asks what is wanted of the names of a guest; its peer is one regular expression for each rule: ratio is
// how many times as long that takes.
func BenchmarkWant(b *testing.B) {
	r := DefaultRules()
	names := []Name{
		{"disk0p1", "/usr/lib/x86_64-linux-gnu/libc.so.6"},
		{"disk0p1", "/usr/share/doc/bash/changelog.gz"},
		{"disk0p1", "/var/lib/dpkg/info/bash.list"},
		{"disk0p1", "/usr/bin/ls"},
		{"disk0p1", "/home/anna/projects/a/b/c/d/file.go"},
		{"disk0p1", "/etc/ssh/sshd_config"},
	}
	var ours float64 // seconds
	b.Run("rules", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if r.Want(names[i%len(names)], regular) == 0 {
				b.Fatal("nothing")
			}
		}
		ours = b.Elapsed().Seconds() / float64(b.N)
	})
	b.Run("regexp", func(b *testing.B) {
		var each []*regexp.Regexp
		for _, rule := range r.All() {
			var parts []string
			for _, p := range rule.Include {
				if p != "/" {
					parts = append(parts, strings.TrimSuffix(strings.TrimPrefix(expression(p).String(), "^"), "$"))
				}
			}
			if len(parts) > 0 {
				each = append(each, regexp.MustCompile("^(?:"+strings.Join(parts, "|")+")$"))
			}
		}
		for i := 0; b.Loop(); i++ {
			for _, e := range each {
				if e.MatchString(names[i%len(names)].Path) {
					break
				}
			}
		}
		b.ReportMetric(b.Elapsed().Seconds()/float64(b.N)/ours, "ratio")
	})
}
