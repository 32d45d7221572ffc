package response

import (
	"encoding/json"
	"slices"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestNames(t *testing.T) {
	for _, r := range All() {
		if got, err := Parse(r.String()); got != r || err != nil {
			t.Errorf("%v: %v, %v", r, got, err)
		}
	}
	for _, bad := range []string{"", "Log", "log ", "quarantine,stop", "response 1"} {
		if r, err := Parse(bad); err == nil || r != 0 {
			t.Errorf("%q: %v", bad, r)
		}
	}
	for _, bad := range []Response{0, Revoke + 1, 255} {
		if b, err := json.Marshal(bad); err == nil {
			t.Errorf("%d was written as %s", uint8(bad), b)
		}
	}
	var policy map[string][]Response
	if err := yaml.Unmarshal([]byte("critical: [quarantine, revoke]\nwarning: [log]\n"), &policy); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(policy["critical"], []Response{Quarantine, Revoke}) || !slices.Equal(policy["warning"], []Response{Log}) {
		t.Errorf("%v", policy)
	}
	if yaml.Unmarshal([]byte("critical: [quarantin]\n"), &policy) == nil {
		t.Error("a name that is none was taken")
	}
}

func TestDecide(t *testing.T) {
	policy := map[string][]Response{
		"info":     {},
		"warning":  {Quarantine},
		"critical": {Revoke, Pause, Log},
		"fatal":    {Stop, Pause},
	}
	for _, c := range []struct {
		found, want string
		worst       Response
	}{
		{"[]", "[]", 0},
		{`["info"]`, `["log"]`, Log},
		{`["nobody named it"]`, `["log"]`, Log},
		{`["warning","info","warning"]`, `["log","quarantine"]`, Quarantine},
		{`["critical"]`, `["log","pause","revoke"]`, Revoke},
		{`["critical","warning"]`, `["log","quarantine","pause","revoke"]`, Revoke},
		{`["fatal","warning"]`, `["log","quarantine","stop"]`, Stop},
	} {
		var found []string
		if err := json.Unmarshal([]byte(c.found), &found); err != nil {
			t.Fatal(err)
		}
		all := Decide(found, policy)
		got, err := json.Marshal(append([]Response{}, all...))
		if err != nil || string(got) != c.want || Worst(all) != c.worst {
			t.Errorf("%s: %s, the worst %v, %v: want %s", c.found, got, Worst(all), err, c.want)
		}
	}
	if !slices.Equal(policy["critical"], []Response{Revoke, Pause, Log}) {
		t.Error("the policy was changed")
	}
	if got := Decide([]int{1}, nil); !slices.Equal(got, []Response{Log}) {
		t.Errorf("without a policy: %v", got)
	}
}
