package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/spec"
)

// server answers with a report, and keeps what it is asked to run.
type server struct {
	redoubtv1connect.UnimplementedGuestServiceHandler
	report isolate.Report
	spec   string
}

func (s *server) Modules(_ context.Context, r *v1.ModulesRequest) (*v1.ModulesResponse, error) {
	if r.Name != "web" {
		return nil, connect.NewError(connect.CodeNotFound, os.ErrNotExist)
	}
	b, err := json.Marshal(s.report)
	return &v1.ModulesResponse{Report: b}, err
}

func (s *server) Run(_ context.Context, r *v1.RunRequest) (*v1.RunResponse, error) {
	s.spec = r.Spec
	return &v1.RunResponse{Guest: &v1.Guest{Name: "web", SpecJson: "{}"}}, nil
}

// command runs a command line against a server.
func command(t *testing.T, s redoubtv1connect.GuestServiceHandler, args ...string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	path := services.APIPath(dir, services.DefaultTenant)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(redoubtv1connect.NewGuestServiceHandler(s))
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	h := &http.Server{Handler: mux, Protocols: &p}
	var wg sync.WaitGroup
	wg.Go(func() { _ = h.Serve(l) })
	defer func() { _ = h.Close(); wg.Wait() }()
	var out bytes.Buffer
	a := &app{out: &out, err: &bytes.Buffer{}}
	root := a.root()
	root.SetArgs(append([]string{"--run-dir", dir}, args...))
	err = root.ExecuteContext(t.Context())
	return out.String(), err
}

var report = isolate.Report{
	Modules: map[string]*isolate.Account{
		"dummy": {
			Verdict: isolate.Isolate, Pages: 2, Entries: map[string]uint64{"dummy_setup [dummy]": 1, "dummy_xmit [dummy]": 40},
			Calls: map[string]uint64{"ether_setup": 1, "consume_skb": 40}, Reads: 3, Writes: map[string]uint64{"init_net": 2}, Unloaded: true,
		},
		"evil\n": {Verdict: isolate.Refuse, Refused: 1},
	},
	Events: []isolate.Event{
		{Kind: isolate.Loaded, Module: "dummy", Detail: "isolated: 2 pages of code", Allowed: true},
		{Kind: isolate.Call, Module: "dummy", Symbol: "commit_creds", At: "dummy_xmit+0x7\x1b[2J"},
	},
	Profiles: []policy.Profile{{Module: "dummy", Calls: []string{"consume_skb", "ether_setup"}, Writes: []policy.Range{{Object: "init_net", From: 8, To: 16}}}},
}

// TestModules: all that a report says is printed, what the guest named as text only; what was learnt is a file of profiles.
func TestModules(t *testing.T) {
	const want = `MODULE  VERDICT  STATE     PAGES  ENTRIES  CALLS  READS  WRITES  REFUSED
dummy   isolate  unloaded  2      41       41     3      2       0
evil�   refuse   refused   0      0        0      0      0       1

MODULE  WHAT   SYMBOL               TIMES
dummy   entry  dummy_xmit [dummy]   40
dummy   entry  dummy_setup [dummy]  1
dummy   call   consume_skb          40
dummy   call   ether_setup          1
dummy   write  init_net             2

LAST EVENTS
allowed  module dummy: loaded: isolated: 2 pages of code
refused  module dummy: call commit_creds from dummy_xmit+0x7�[2J
`
	s := &server{report: report}
	if out, err := command(t, s, "modules", "web"); err != nil || out != want {
		t.Errorf("%v\n%s\nwant\n%s", err, out, want)
	}
	var got isolate.Report
	out, err := command(t, s, "modules", "web", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	if err != nil || !reflect.DeepEqual(got, report) {
		t.Errorf("%v\n%s", err, out)
	}
	out, err = command(t, s, "modules", "web", "--learned")
	if err != nil {
		t.Fatal(err)
	}
	if profiles, err := policy.Read(strings.NewReader(out)); err != nil || !reflect.DeepEqual(profiles, report.Profiles) {
		t.Errorf("%v, %v:\n%s", profiles, err, out)
	}
	if out, err := command(t, s, "modules", "web", "--learned", "--json"); err != nil || !strings.Contains(out, `"object": "init_net"`) {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := command(t, s, "modules", "other"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	s.report = isolate.Report{}
	if out, err := command(t, s, "modules", "web", "--learned"); err == nil || out != "" {
		t.Errorf("nothing was learnt: %q, %v", out, err)
	}
	if out, err := command(t, s, "modules", "web"); err != nil || strings.Count(out, "\n") != 1 {
		t.Errorf("an empty report: %q, %v", out, err)
	}
}

// TestModulesFlags: each flag makes the section, also one that is given nothing; a path is settled here. Where they would be
// passed over they are refused.
func TestModulesFlags(t *testing.T) {
	profile := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(profile, []byte("module: a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := profile + ".link"
	if err := os.Symlink(profile, link); err != nil {
		t.Fatal(err)
	}
	strict := &spec.Modules{Default: spec.Isolate, Mode: spec.Enforce}
	for _, c := range []struct {
		args string
		want *spec.Modules
	}{
		{"", nil},
		{"--modules=", strict},
		{"--modules isolate", strict},
		{"--modules-mode learn", &spec.Modules{Default: spec.Isolate, Mode: spec.Learn}},
		{"--modules refuse --modules-trusted ext4,virtio-net", &spec.Modules{Default: spec.Refuse, Mode: spec.Enforce, Trusted: []string{"ext4", "virtio_net"}}},
		{"--modules-profile " + link, &spec.Modules{Default: spec.Isolate, Mode: spec.Enforce, Profile: profile}},
	} {
		s := &server{}
		if _, err := command(t, s, append([]string{"run", "--name", "web", "--kernel", "/k"}, strings.Fields(c.args)...)...); err != nil {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		g, err := spec.Parse(strings.NewReader(s.spec))
		if err != nil || !reflect.DeepEqual(g.Modules, c.want) {
			t.Errorf("%s: %+v, %v", c.args, g, err)
		}
	}
	for args, want := range map[string]string{
		"run --name web --kernel /k --emulator qemu --modules isolate": "emulator: qemu isolates no modules",
		"run --name web --kernel /k --modules fence":                   "modules.default",
		"run web --modules isolate":                                    "goes with --name",
	} {
		if _, err := command(t, &server{}, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", args, err)
		}
	}
}
