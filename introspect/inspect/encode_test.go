package inspect

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/modules"
)

// TestEncode: an answer is written as json.Marshal would, but for the order of members.
func TestEncode(t *testing.T) {
	long := bytes.Repeat([]byte("list\x00\xff"), 100_000)
	for name, a := range map[string]*Answer{
		"nothing":       {},
		"an empty list": {IMA: &list.List{}},
		"why not":       {IMA: &list.List{Missing: `a "quoted" <reason>`}, Tasks: &TaskFacts{Damage: "x"}},
		"a list":        {IMA: &list.List{List: long}},
		"all": {
			Modules: &ModuleFacts{Modules: []modules.Module{{Name: "dummy"}}, Damage: "m"},
			Kernel:  &KernelFacts{Version: "6.12", Levels: 4},
			IMA:     &list.List{After: 7, List: long[:1000], Error: "cut"},
			Tasks:   &TaskFacts{Damage: strings.Repeat("t", 100_000)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := a.Encode()
			if err != nil {
				t.Fatal(err)
			}
			want, err := json.Marshal(a)
			if err != nil {
				t.Fatal(err)
			}
			var g, w any
			if err := json.Unmarshal(got, &g); err != nil {
				t.Fatalf("%.200s: %v", got, err)
			}
			if err := json.Unmarshal(want, &w); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(g, w) {
				t.Errorf("%.200s, want %.200s", got, want)
			}
		})
	}
}
