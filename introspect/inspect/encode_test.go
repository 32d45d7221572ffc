package inspect

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/modules"
)

// TestEncode: an answer is read as it was written, its IMA list beside its JSON.
func TestEncode(t *testing.T) {
	long := bytes.Repeat([]byte("list\x00\xff"), 100_000)
	for name, a := range map[string]*Answer{
		"nothing":       {},
		"an empty list": {IMA: &list.List{List: []byte{}}},
		"why not":       {IMA: &list.List{Missing: `a "quoted" <reason>`, List: []byte{}}, Tasks: &TaskFacts{Damage: "x"}},
		"a list":        {IMA: &list.List{List: long}},
		"all": {
			Modules: &ModuleFacts{Modules: []modules.Module{{Name: "dummy"}}, Damage: "m"},
			Kernel:  &KernelFacts{Version: "6.12", Levels: 4},
			IMA:     &list.List{After: 7, List: long[:1000], Error: "cut"},
			Tasks:   &TaskFacts{Damage: strings.Repeat("t", 100_000)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			text, raw, err := a.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if a.IMA != nil && (len(raw) != len(a.IMA.List) || len(text) > 200_000) {
				t.Errorf("%d bytes and %d beside them", len(text), len(raw))
			}
			if got, err := Decode(text, raw); err != nil || !reflect.DeepEqual(got, a) {
				t.Errorf("%+v, %v, want %+v", got, err, a)
			}
		})
	}
	for text, raw := range map[string]string{"{": "", "{}": "a list", `{"ima":7}`: ""} {
		if a, err := Decode([]byte(text), []byte(raw)); err == nil {
			t.Errorf("%s and %q are %+v", text, raw, a)
		}
	}
}
