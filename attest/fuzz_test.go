package attest

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// fixedLab has the keys of the corpus: good evidence in it stays good.
func fixedLab(f *testing.F) *lab {
	return &lab{
		newSoftTPM(f, fixedKey(f, 1), fixedKey(f, 2)), newTestCA(f, fixedKey(f, 3), fixedKey(f, 4)),
		[]byte("sixteen byte non"),
	}
}

// Whatever the evidence, Verify returns; and it finds good only what says the same as the good
// one: the quote, the key, the registers and the measurements are all bound.
func FuzzVerify(f *testing.F) {
	l := fixedLab(f)
	e := l.boot(f, bootEvents(f, "kernel", "quiet ro"))
	o := l.options()
	var err error
	if o.Policy, err = PolicyFrom(e); err != nil {
		f.Fatal(err)
	}
	good, err := json.Marshal(e)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"quote":"","pcrs":["00"],"ek_chain":[""]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := DecodeEvidence(bytes.NewReader(b))
		if err != nil {
			return
		}
		r := Verify(got, o)
		if r.OK && (!bytes.Equal(got.Quote, e.Quote) || len(r.Steps) != 9) {
			t.Fatalf("other evidence passed: %s", b)
		}
		if (r.Failed() == nil) != r.OK {
			t.Fatalf("OK is %v, failed step %v", r.OK, r.Failed())
		}
		_, _ = PolicyFrom(got) // must return
		_, _ = got.files()     // the same
	})
}

// Structures of a TPM, as they come from outside: what is taken is in its only form.
func FuzzStructures(f *testing.F) {
	l := fixedLab(f)
	e := l.boot(f, bootEvents(f, "kernel", "ro"))
	f.Add(e.AK, e.Quote, e.Signature)
	f.Add(tpm2.Marshal(tpm2.New2B(l.tpm.akPub)), []byte{0xff}, []byte{0})
	key := &l.tpm.ak.PublicKey
	f.Fuzz(func(t *testing.T, ak, quote, signature []byte) {
		if k, err := parseAK(ak); err == nil {
			if again := tpm2.Marshal(*k.public); !bytes.HasSuffix(ak, again) {
				t.Fatalf("AK of another form: %x, %x", ak, again)
			}
			_, _ = k.check() // must return
			if _, _, _, err := MakeCredential(key, k.name); err != nil {
				t.Fatalf("no credential for the name %x: %v", k.name, err)
			}
		}
		_, _ = checkSignature(key, quote, signature) // must return
		if a, err := unmarshal[tpm2.TPMSAttest](quote); err == nil {
			_, _ = a.Attested.Quote()
		}
	})
}
